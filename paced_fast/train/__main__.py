"""`python -m paced_fast.train`."""

from paced_fast.run.start import signals
from paced_fast.train import main

if __name__ == "__main__":
    signals.end_at_interrupt()
    main()
