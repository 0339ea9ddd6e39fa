"""The masked RNN against torch.nn.RNN with the same masked weights."""
