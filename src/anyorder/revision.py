"""The public path of `anyorder.decoding.revision`."""

from anyorder.decoding.revision import Refinement, Revision, refine, revise

__all__ = ["Refinement", "Revision", "refine", "revise"]
