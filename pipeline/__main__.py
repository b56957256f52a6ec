"""`geomerge` and `python -m pipeline`: the command line, with signals taken care of before anything is imported."""

from __future__ import annotations

from pipeline.signals import install


def run() -> None:
    """Run the command line of this process."""
    install()
    from pipeline.cli import main

    main()


if __name__ == "__main__":
    run()
