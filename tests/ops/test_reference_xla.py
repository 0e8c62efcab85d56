"""The implementations in plain jnp."""

from base import MatmulTests


class TestReference(MatmulTests):
    implementation = "reference"


class TestXla(MatmulTests):
    implementation = "xla"
