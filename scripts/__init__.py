"""Commands of the Makefile. Run one from the project's folder: python -m scripts.wheels"""
