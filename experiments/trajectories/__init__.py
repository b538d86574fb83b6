"""Tests whether conflict, sharpness or Fisher traces explain transfer."""
