"""The geometric penalty: the function, its forms in place and for several layers, regularizers."""
