"""What somebody may have meant."""

from gptvq_jax.console.nearest_name import nearest_name, nearest_names

KNOWN = ("arc_easy", "arc_challenge", "piqa", "hellaswag")


def test_the_nearest_come_first_and_what_is_unlike_not_at_all():
    assert nearest_names("arc_esay", KNOWN, 3) == ["arc_easy", "arc_challenge"]
    assert nearest_names("arc_esay", KNOWN, 1) == ["arc_easy"] == [nearest_name("arc_esay", KNOWN)]
    assert nearest_names("xyz", KNOWN, 3) == [] and nearest_name("xyz", KNOWN) is None
