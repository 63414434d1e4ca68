"""`python -m launcher.cli`, as a detached run is started."""

from . import main

if __name__ == "__main__":
    main()
