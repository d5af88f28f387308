"""The last import of tests/forked.py's server: no collection walks, and so copies, what the server holds.

Without this one began in every fork, or in none: that depends on how many objects the imports had made.
"""

import gc

gc.disable()
gc.freeze()
