"""`python -m paced_fast.evaluate`."""

from paced_fast.evaluate import main
from paced_fast.run.start import signals

if __name__ == "__main__":
    signals.end_at_interrupt()
    main()
