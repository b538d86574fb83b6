"""Tests whether conflict, sharpness or Fisher information explain transfer."""
