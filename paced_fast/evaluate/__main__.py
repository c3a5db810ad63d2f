"""`python -m paced_fast.evaluate`."""

from paced_fast.evaluate import main

if __name__ == "__main__":
    main()
