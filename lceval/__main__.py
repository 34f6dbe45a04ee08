"""`python -m lceval`, as used by `accelerate launch -m lceval train RECIPE`."""

from lceval.cli import main

if __name__ == "__main__":
    main()
