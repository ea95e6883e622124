"""The project's own test bed: made models, a hub served by nginx, faults in front of it, and olah.

Nothing here is downloaded, every server binds to 127.0.0.1 on free ports, all state lies in one folder.

    python -m tests.testbed.models --only llama     makes the 2 GB models that benchmarks load
    python -m tests.testbed.nginx_hub MODEL_DIR …   serves folders as a hub until Ctrl-C
"""
