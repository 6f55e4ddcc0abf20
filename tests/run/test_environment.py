from __future__ import annotations

import subprocess
from pathlib import Path

from largescale.run import environment


def test_training_starts_where_there_is_no_git(monkeypatch):
    monkeypatch.setenv("PATH", "/not-there")
    assert environment.environment()["git_revision"] == "unknown (No such file or directory: git)"


def test_the_revision_of_a_repository_around_the_environment_is_not_ours(tmp_path, monkeypatch):
    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True)

    def revision(name: str) -> str:
        monkeypatch.setattr(environment, "__file__", str(tmp_path / name))
        return environment.environment()["git_revision"]

    for name in ("tracked.py", "installed.py"):
        Path(tmp_path / name).touch()
    git("init", "-q")
    git("add", "tracked.py")
    git("commit", "-qm", "theirs")
    assert revision("installed.py") == "not a git checkout"
    assert len(revision("tracked.py")) == 40
