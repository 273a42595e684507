"""What the image is made of: locks of what runs and of what builds, and the bill of materials."""
