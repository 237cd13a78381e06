"""`python -m fgpu_ebpf.gatekeeper`: the command with which an agent starts the gatekeeper process."""

import sys

from fgpu_ebpf.gatekeeper.main import main

if __name__ == "__main__":
    sys.exit(main())
