import sys

from cluster.simulation.main import main

if __name__ == "__main__":
    sys.exit(main())
