"""Names of other libraries that their next version may drop: each library has files of its own, and nothing else here uses such names.

Each name has what runs without it, or one sentence that names the library's version and the way out. `versions` says which versions were
tested.
"""
