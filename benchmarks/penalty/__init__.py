"""The penalty against the forms of its formula that a PyTorch user could run instead, and against a copy of W."""
