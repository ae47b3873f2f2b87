"""The graph service: submit, list, watch, cancel and resume runs over HTTP, with a page. See `app` for the routes.

Who waits for whom: `actor` is a detached Ray actor; it serves `app` and runs one `supervisor` thread. The supervisor
starts one `driver` process per run and checks about once a second that it lives. All state is in the store: the actor
may die at any time, and its successor, on this cluster or another, continues its work.
"""
