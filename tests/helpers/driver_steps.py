"""Steps that a worker of test_store_faults.py runs in its own process."""

from workflows.graph import step


@step
def says() -> int:
    print("something for the log")
    return 7


@step
def says_and_fails() -> int:
    print("something for the log")
    raise ValueError("the user's own")
