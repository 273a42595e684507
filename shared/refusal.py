"""The one way in which business code says no. Pure: it knows neither gRPC nor any store."""


class Refusal(Exception):
    """A request that is not carried out, and has changed nothing.

    `reason` is the name of a value of the API's ErrorReason without its prefix; `metadata` holds the
    keys that the enum documents. `message` is for people and holds no personal data.
    """

    def __init__(self, reason: str, message: str, **metadata: object) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata = {key: str(value) for key, value in metadata.items()}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Refusal) and (self.reason, self.metadata) == (other.reason, other.metadata)

    def __hash__(self) -> int:
        return hash((self.reason, tuple(sorted(self.metadata.items()))))
