"""Which masks pruning leaves under each penalty, and how few blocks hold them."""
