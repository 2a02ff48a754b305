"""What tests run in processes of their own: spawned ones import it by name, which they cannot do with a test module."""


def put_token_sum(store, caption, queue):
    """Send the sum of a caption's tokens."""
    queue.put(store[caption][0].sum().item())
