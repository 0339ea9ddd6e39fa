"""Trains recurrent nets while pruning them: what a task is, one resumable run, many runs at once, their records."""
