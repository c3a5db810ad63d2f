"""`python -m paced_fast.export`."""

from paced_fast.export import main

if __name__ == "__main__":
    main()
