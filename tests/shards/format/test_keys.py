"""Keys of files that share a name."""

from __future__ import annotations

from shards.format.keys import FreshKeys


def test_files_of_one_name_get_numbers():
    keys = FreshKeys()
    names = ["a.png", "a~2.png", "a.jpg", "a.webp", "a~2~2.gif", "a~2.jpg", "b.c.png", "b_c.png", "a.gif"]
    assert [keys.of_file(name) for name in names] == [
        "a", "a_2", "a~2", "a~3", "a_2_2", "a_2~2", "b_c", "b_c~2", "a~4",
    ]  # fmt: skip


def test_names_that_share_a_base_are_looked_up_once_each():
    class Counted(set[str]):
        looks = 0

        def __contains__(self, key: object) -> bool:
            self.looks += 1
            return super().__contains__(key)

    keys = FreshKeys()
    keys._taken = Counted()
    found = [keys.of_file(f"{chr(0x1F600 + number % 50)}{chr(0x1F600 + number // 50)}.png") for number in range(2000)]
    assert found == ["__", *(f"__~{number}" for number in range(2, 2001))]
    assert keys._taken.looks < 3 * 2000
