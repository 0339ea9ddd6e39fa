"""What `make gpu` runs on a machine with a CUDA GPU: python -m scripts.gpu

The modules:
    command                   the command: all parts in turn, the record and the summary
    suite, sharding           the test suite, in several processes
    sanitizer                 compute-sanitizer over workload.py, after each of its tools has found a planted bug
    workload, workload_rnn    small runs of every kernel, compared with the reference on the CPU
    plants, plants_triton     the planted bugs
    benchmark                 the benchmarks
"""
