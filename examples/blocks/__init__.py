"""Does geometry pay for the blocks? A study of nets cut weight by weight and in blocks, with fair rivals.

    python -m examples.blocks                 train what the ledger lacks, then report
    python -m examples.blocks speed           measure the pruned nets that lie in runs/ on this machine
    python -m examples.blocks report          tables and pictures of what is recorded

    ring       head direction, whose hidden space is a circle
    plan       the trials: families, strengths, seeds, and the protocol
    penalties  what each family adds to the loss, and the order in which it is cut
    training   trains a trial: until it has converged, then through the cuts
    speed      seconds of a pruned net, beside those of torch.nn.RNN
    results    what the records say: curves, paired differences, intervals, the verdict
    report     the table and the pictures
"""
