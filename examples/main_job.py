"""The main job: 20 researchers count their progress, ask one API, and hand on to a writer. How much of it arrives?

Its code is agentdiff/monitor/main_job.py, so that the command `agentdiff demo` can run it too.
"""

from agentdiff.monitor.main_job import main

print(main())
