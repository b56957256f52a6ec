"""`python -m pipeline`: the same command line as `geomerge`."""

from pipeline.cli import main

if __name__ == "__main__":
    main()
