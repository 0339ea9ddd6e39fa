"""Fetches and checks the two data sets, WikiText-2 and LibriSpeech, and computes speech features from the latter."""
