"""How the method runs: attention on each device, loading, data order, checkpoints, processes. The
method itself is one folder up.
"""
