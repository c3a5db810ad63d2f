"""`python -m paced_fast.export`."""

from paced_fast.export import main
from paced_fast.run.start import signals

if __name__ == "__main__":
    signals.end_at_interrupt()
    main()
