import pytest

from tokquant import cli


@pytest.fixture
def tokquant(capsys, monkeypatch):
    """A command line: words to exit code, standard output and standard error."""

    def run(*words):
        monkeypatch.setattr("sys.argv", ["tokquant", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
            raise SystemExit(0)
        out = capsys.readouterr()
        return stop.value.code or 0, out.out, out.err

    return run
