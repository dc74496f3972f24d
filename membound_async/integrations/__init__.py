"""Where memory is bounded in front of somebody else's program, one module for each kind.

- ``asgi``: `MemoryMiddleware` for web applications.
"""
