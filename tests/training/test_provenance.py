"""The commit of a result: that of the code."""

import subprocess

from titans.training.provenance import _commit


def git(folder, *command):
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(["git", "-C", str(folder), *who, *command], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_a_table_beside_the_code_leaves_the_commit_clean(tmp_path):
    package = tmp_path / "src"
    package.mkdir()
    assert _commit(package) is None
    code, table = package / "code.py", tmp_path / "table.md"
    for path in (code, table):
        path.write_text("one")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "one")
    head = git(tmp_path, "rev-parse", "HEAD")[:12]
    table.write_text("two")
    assert _commit(package) == head
    code.write_text("two")
    assert _commit(package) == f"{head}-dirty"
