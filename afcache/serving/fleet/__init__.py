"""A fleet of batchers behind HTTP: replicas that Ray Serve starts, scales and starts again, and requests that outlive them.

What can be tested without Ray knows nothing of it: only `fleet.app` imports ray.
"""
