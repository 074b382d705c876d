"""The decode loop, policies, and what is built on them."""
