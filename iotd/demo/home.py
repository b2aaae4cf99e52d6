"""A simulated home: rooms, doors, appliances and one inhabitant, from one seed, in simulated time.

The same seed gives the same day, whatever the steps it is advanced in. Knows no broker: `simulate` publishes it.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

TICK_S = 1.0
"""The home moves on in ticks of this many simulated seconds."""
SLOW_TICKS = 10
"""Weather, warmth and damp move on once in so many ticks."""
SLOW_S = SLOW_TICKS * TICK_S
DAY_S = 86400.0

HEATED_C = {
    "kitchen": 20.5,
    "lounge": 21.5,
    "hallway": 18.5,
    "bedroom": 18.0,
    "bathroom": 22.0,
    "garage": 9.0,
    "study": 20.0,
    "nursery": 21.0,
    "attic": 14.0,
    "cellar": 11.0,
}
"""Every room that a home may have, and where its thermostat is set by day, °C, give or take what the people like."""
ROOMS = ("kitchen", "lounge", "hallway", "bedroom", "bathroom", "garage")
"""The rooms of the home that is shown."""
DOORS = ("front", "back", "garage")
ROOM_OF_DOOR = {"front": "hallway", "back": "kitchen", "garage": "garage"}
AT_DOOR = {"person": (3600.0, 40.0), "car": (5400.0, 300.0), "dog": (7200.0, 25.0), "bicycle": (9000.0, 120.0)}
"""What passes the door camera: mean seconds between its visits, and mean seconds it stays."""
PARCEL_EVERY_S, PARCEL_STAYS_S = 14400.0, 5400.0

_ROOM_TIME_S = 7200.0
"""A room comes 63 % nearer to its thermostat in this time, as a house with radiators does."""
_DRAUGHT_TIME_S = 1500.0
"""The same towards the outside, with a door open."""
_DAMP_TIME_S = 1200.0
_MOTION_CLEARS_S = 30.0
_LONG_AWAY = ("away", 2700.0, 14400.0)
_LIKED = {"kitchen": 4, "lounge": 4, "hallway": 3, "garage": 1, "attic": 1, "cellar": 1, "away": 1}
"""How often the inhabitant goes to a room; twice to one that is not named here."""


@dataclass
class Room:
    """Truth of one room."""

    temperature: float
    """°C."""
    humidity: float
    """Relative, %."""
    motion: bool = False
    last_motion_s: float = -math.inf


@dataclass
class Truth:
    """What is so, exactly, at one moment of simulated time."""

    time_s: float
    """Seconds since midnight of the first day."""
    outside_c: float
    rooms: dict[str, Room]
    doors: dict[str, bool]
    """Whether each door is open."""
    power: dict[str, float]
    """Watts each appliance draws."""
    place: str = "bedroom"
    """The room the inhabitant is in, or `away`."""
    at_door: tuple[str, ...] = ()
    """What the door camera can see, in a fixed order."""


@dataclass(frozen=True, slots=True)
class Change:
    """Something that a device would report at once: a door, a motion sensor."""

    device: str
    """`door` or `motion`."""
    name: str
    state: str


@dataclass
class _Plan:
    """What will happen next, in simulated seconds."""

    moves_s: float = 0.0
    door_closes_s: dict[str, float] = field(default_factory=dict)
    kettle_off_s: float = 0.0
    washer_off_s: float = 0.0
    shower_ends_s: float = 0.0
    leaves_s: dict[str, float] = field(default_factory=dict)


class Home:
    """Advance it in time and look at `truth`.

    start_s: seconds since midnight at which it begins. spread_c: standard deviation of its thermostats from HEATED_C.
    lived_in: begins in the middle of a day's life, with doors open and somebody at the door, instead of at rest.
    """

    def __init__(
        self,
        seed: int,
        start_s: float = 8 * 3600.0,
        *,
        rooms: Sequence[str] = ROOMS,
        spread_c: float = 1.0,
        lived_in: bool = False,
    ) -> None:
        self._rng = random.Random(seed)
        self._start_s = self._asked_s = start_s
        self._n_ticks = 0
        outside_c = self._rng.uniform(-2, 14)
        self._mean_outside_c = outside_c
        self._weather_c = 0.0
        self._heated_c = {name: HEATED_C[name] + self._rng.gauss(0, spread_c) for name in rooms}
        begin = {
            name: Room(c + self._rng.uniform(-1, 1), self._rng.uniform(38, 52)) for name, c in self._heated_c.items()
        }
        power = {"fridge": 90.0, "kettle": 0.0, "washer": 0.0}
        self.truth = Truth(start_s, outside_c, begin, dict.fromkeys(DOORS, False), power)
        self._plan = _Plan(moves_s=start_s + self._rng.uniform(20, 120))
        self._fridge_phase_s = self._rng.uniform(0, 2400)
        if lived_in:
            self._live()

    def _live(self) -> None:
        now_s, rng = self.truth.time_s, self._rng
        self.truth.place = rng.choice((*self.truth.rooms, "away"))
        for door in DOORS:
            if rng.random() < 0.35:
                self.truth.doors[door] = True
                self._plan.door_closes_s[door] = now_s + rng.expovariate(1 / 120)
        for name, room in self.truth.rooms.items():
            if rng.random() < (0.9 if name == self.truth.place else 0.15):
                room.motion, room.last_motion_s = True, now_s - rng.uniform(0, _MOTION_CLEARS_S)
        for thing in (*AT_DOOR, "parcel"):
            if rng.random() < 0.3:
                self._appears(thing, rng.expovariate(1 / 180))
        self._plan.kettle_off_s = now_s + rng.uniform(-200, 100)
        self._plan.washer_off_s = now_s + rng.uniform(-3000, 3300)

    def advance(self, seconds: float) -> list[Change]:
        """Move on by whole ticks until `seconds` have passed; returns what changed, in order."""
        return self.advance_to(self._asked_s + seconds)

    def advance_to(self, time_s: float) -> list[Change]:
        """The same, to a moment: seconds since midnight of the first day."""
        self._asked_s = time_s
        changes: list[Change] = []
        while self._start_s + (self._n_ticks + 1) * TICK_S <= time_s + 1e-6:
            self._n_ticks += 1
            self.truth.time_s = self._start_s + self._n_ticks * TICK_S
            changes += self._tick()
        return changes

    def _tick(self) -> list[Change]:
        changes = [*self._close_doors(), *self._move(), *self._sense_motion()]
        self._appliances()
        self._door_step()
        if self._n_ticks % SLOW_TICKS == 0:
            self._weather()
            for name, room in self.truth.rooms.items():
                self._climate(name, room)
        return changes

    def _weather(self) -> None:
        """Coldest at five, warmest at five in the afternoon, with slow weather on top."""
        self._weather_c += -self._weather_c * SLOW_S / 14400 + self._rng.gauss(0, 0.038)
        daily = 4.0 * math.sin(2 * math.pi * (self.truth.time_s / DAY_S - 11 / 24))
        self.truth.outside_c = self._mean_outside_c + daily + self._weather_c

    def _close_doors(self) -> Iterator[Change]:
        for door, closes_s in list(self._plan.door_closes_s.items()):
            if self.truth.time_s >= closes_s:
                del self._plan.door_closes_s[door]
                self.truth.doors[door] = False
                yield Change("door", door, "closed")

    def _open(self, door: str, for_s: float) -> Iterator[Change]:
        self._plan.door_closes_s[door] = self.truth.time_s + for_s
        if not self.truth.doors[door]:
            self.truth.doors[door] = True
            yield Change("door", door, "open")

    def _move(self) -> Iterator[Change]:
        if self.truth.time_s < self._plan.moves_s:
            return
        before, self.truth.place = self.truth.place, self._next_place()
        self._plan.moves_s = self.truth.time_s + self._dwell_s(self.truth.place)
        if "away" in (before, self.truth.place):
            yield from self._open("front", self._rng.uniform(4, 20))
            self._appears("person", self._rng.uniform(8, 25))
        elif self.truth.place == "garage":
            yield from self._open("garage", self._rng.uniform(30, 400))
        elif self.truth.place == "kitchen":
            yield from self._in_kitchen()
        elif self.truth.place == "bathroom" and self._rng.random() < 0.3:
            self._plan.shower_ends_s = self.truth.time_s + self._rng.uniform(240, 600)

    def _in_kitchen(self) -> Iterator[Change]:
        if self._rng.random() < 0.4:
            self._plan.kettle_off_s = self.truth.time_s + self._rng.uniform(120, 200)
        if self._rng.random() < 0.1:
            self._plan.washer_off_s = self.truth.time_s + self._rng.uniform(2400, 5400)
        if self._rng.random() < 0.2:
            yield from self._open("back", self._rng.uniform(10, 900))

    def _next_place(self) -> str:
        if self._asleep():
            at_night = [name for name in self.truth.rooms if name in ("bedroom", "bathroom")] or [*self.truth.rooms]
            return self._rng.choices(at_night, [9 if name == "bedroom" else 1 for name in at_night])[0]
        if self.truth.place == "away" and "hallway" in self.truth.rooms:
            return "hallway"
        places = (*self.truth.rooms, "away")
        weights = [0 if place == self.truth.place else _LIKED.get(place, 2) for place in places]
        return self._rng.choices(places, weights)[0]

    def _dwell_s(self, place: str) -> float:
        if self._asleep():
            return self._rng.uniform(300, 600) if place == "bathroom" else self._rng.uniform(3600, 10800)
        if place == _LONG_AWAY[0]:
            return self._rng.uniform(*_LONG_AWAY[1:])
        return self._rng.uniform(20, 90) if place == "hallway" else self._rng.expovariate(1 / 900) + 60

    def _asleep(self) -> bool:
        hour = self.truth.time_s % DAY_S / 3600
        return hour >= 23 or hour < 6.5

    def _sense_motion(self) -> Iterator[Change]:
        """A sensor fires while someone moves in its room, and clears half a minute after the last movement."""
        stirs = self._rng.random() < (0.0005 if self._asleep() else 0.08)
        for name, room in self.truth.rooms.items():
            if stirs and name == self.truth.place:
                room.last_motion_s = self.truth.time_s
            moving = self.truth.time_s - room.last_motion_s < _MOTION_CLEARS_S
            if moving != room.motion:
                room.motion = moving
                yield Change("motion", name, "detected" if moving else "clear")

    def _appliances(self) -> None:
        now_s, power = self.truth.time_s, self.truth.power
        # A compressor runs 14 minutes in every 40.
        power["fridge"] = 92.0 if (now_s + self._fridge_phase_s) % 2400 < 840 else 1.5
        power["kettle"] = 2150.0 if now_s < self._plan.kettle_off_s else 0.0
        # A washer heats first, then turns.
        left_s = self._plan.washer_off_s - now_s
        power["washer"] = 0.0 if left_s <= 0 else 2000.0 if left_s > 3000 else 320.0

    def _climate(self, name: str, room: Room) -> None:
        night = 2.5 if self._asleep() and name != "garage" else 0.0
        room.temperature += (self._heated_c[name] - night - room.temperature) * SLOW_S / _ROOM_TIME_S
        if any(is_open and ROOM_OF_DOOR[door] == name for door, is_open in self.truth.doors.items()):
            room.temperature += (self.truth.outside_c - room.temperature) * SLOW_S / _DRAUGHT_TIME_S
        showering = name == "bathroom" and self.truth.time_s < self._plan.shower_ends_s
        damp, time_s = (92.0, 300.0) if showering else (45.0, _DAMP_TIME_S)
        room.humidity += (damp - room.humidity) * SLOW_S / time_s + self._rng.gauss(0, 0.06)
        room.temperature += self._rng.gauss(0, 0.006)

    def _appears(self, thing: str, for_s: float) -> None:
        leaves_s = self.truth.time_s + for_s
        self._plan.leaves_s[thing] = max(leaves_s, self._plan.leaves_s.get(thing, 0.0))

    def _door_step(self) -> None:
        for thing, (every_s, stays_s) in AT_DOOR.items():
            rate = TICK_S / (every_s * (8 if self._asleep() else 1))
            if self._rng.random() < rate:
                self._appears(thing, self._rng.expovariate(1 / stays_s) + 5)
        if not self._asleep() and self._rng.random() < TICK_S / PARCEL_EVERY_S:
            self._appears("person", 20)
            self._appears("parcel", self._rng.uniform(0.5, 1.5) * PARCEL_STAYS_S)
        self._plan.leaves_s = {k: v for k, v in self._plan.leaves_s.items() if v > self.truth.time_s}
        self.truth.at_door = tuple(sorted(self._plan.leaves_s))
