"""`python -m fgpu_ebpf.parker`: the command that starts the parker process."""

import sys

from fgpu_ebpf.parker.main import main

if __name__ == "__main__":
    sys.exit(main())
