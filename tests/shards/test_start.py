"""The `shards` command where there is too little memory to load it."""

from __future__ import annotations

from tests.helpers.commands import run_python

LIMITED = """
import os, resource, sys

def allow(megabytes):
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGESIZE") + megabytes * 2**20,) * 2)
    sys.argv = ["shards", "info", "/no/folder"]
    from shards.__main__ import main
    sys.exit(main())

def said(megabytes):
    reading, writing = os.pipe()
    if not (process := os.fork()):
        os.dup2(writing, 2)
        allow(megabytes)
    os.close(writing)
    lines = os.fdopen(reading).read().splitlines() or [""]
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), "Traceback" in str(lines), lines[-1]

for megabytes in (130, 170, 200, 218, 224):
    found = said(megabytes)
    if found[0] < 0:  # once in some hundred times a library aborts before anybody can catch it
        found = said(megabytes)
    print(*found)
"""


def test_too_little_memory_to_load_it_is_a_line():
    """libarrow crashes at the end of a process that could not load it."""
    lines = run_python("-c", LIMITED).stdout.splitlines()
    assert len(lines) == 5 and all(line.startswith("2 False error: ") for line in lines), "\n".join(lines)
    assert any("error: shards cannot be loaded" in line and "`ulimit -v`" in line for line in lines), lines
