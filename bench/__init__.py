"""What Holdfast does, measured beside what bounds it and what it replaces.

Absolute figures differ from machine to machine, so every target is a ratio of two figures measured in one
run: beside a bare echo server (`echo`: the ceiling of Python, gRPC and the generator on this machine) and
beside the usual way (`usual`: one transaction a request with SELECT ... FOR UPDATE). The two are measured
in turn, round after round; a ratio is the median of the rounds' ratios, and its spread is shown.

PostgreSQL runs with fsync and synchronous_commit on, with all services, relays and consumers, and the load
generator is on the same machine. The settings are those of `make run`. Nothing is left out: errors and
refusals are counted apart, and a target that is missed is shown as missed.

    load      one run of a generator: calls, errors, latencies, CPU of each side
    stage     what is measured: the stack, the pods, echo, the usual way, their data
    __main__  the keys: which runs, in which order, and what they come to
    report    the table, the picture, the file
"""
