"""`python -m paced_fast.train`."""

from paced_fast.train import main

if __name__ == "__main__":
    main()
