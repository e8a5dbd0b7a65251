"""Training without captions: a picture's CLIP embedding stands in for a prompt."""
