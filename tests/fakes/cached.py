"""agent_vm.py as `python3 agent_vm.py` runs it, but from cached bytecode.

Compiling it takes longer than all the rest of a short command, and the tests start it 300 times.
"""

import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from agent_vm import main  # noqa: E402

sys.exit(main())
