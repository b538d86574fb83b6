"""Does conflict, sharpness or Fisher information explain transfer?"""
