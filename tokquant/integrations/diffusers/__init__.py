"""tokquant as the attention of diffusers models: a named attention backend, or schemes for the layers of one model.

Importing this does not import diffusers.
"""

from tokquant.integrations.diffusers.registration import register, unregister, use

__all__ = ["register", "unregister", "use"]
