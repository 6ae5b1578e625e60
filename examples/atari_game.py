"""An Atari game as the network sees it: a stack of small screens, and a few actions."""

from __future__ import annotations

import numpy as np
from ale_py import ALEInterface, LoggerMode, roms
from atari_network import OBSERVATION_SHAPE, ByteArray

FRAMES_PER_MOVE = 4  # how long an action is held, as is usual with Atari

# The emulator's screen has 210 x 160 pixels. Every 2.19th row and every 1.67th column make 96 x 96.
SCREEN_ROWS = ((np.arange(96) + 0.5) * 210 / 96).astype(np.intp)
SCREEN_COLUMNS = ((np.arange(96) + 0.5) * 160 / 96).astype(np.intp)


class AtariGame:
    """A game in its emulator. When it is over, the next one starts automatically."""

    def __init__(self, name: str, seed: int) -> None:
        """Load a game by its name, such as "space_invaders"."""
        ALEInterface.setLoggerMode(LoggerMode.Error)  # or every process would print a banner
        rom = roms.get_rom_path(name)
        if rom is None:
            raise ValueError(f"ale-py has no game called {name!r}")
        self._emulator = ALEInterface()
        self._emulator.setInt("random_seed", seed)
        self._emulator.loadROM(rom)
        # The actions that do something in this game, as numbers from 0 to 17.
        self.actions = [action.value for action in self._emulator.getMinimalActionSet()]
        # uint8, (96, 96, 3, 4): rows, columns, colours, and the last four screens, newest last.
        self.observation: ByteArray = np.zeros(OBSERVATION_SHAPE, np.uint8)
        self.frames = 0  # shown since the game was loaded
        self.points = 0  # won since then, in all games
        self.games_over = 0
        self._start_over()

    def act(self, action: int) -> None:
        """Hold an action for one move, then observe the screen."""
        for _ in range(FRAMES_PER_MOVE):
            self.points += self._emulator.act(action)
            self.frames += 1
            if self._emulator.game_over():
                self.games_over += 1
                self._start_over()
                return
        self.observation[..., :-1] = self.observation[..., 1:]
        self.observation[..., -1] = self._small_screen()

    def _start_over(self) -> None:
        self._emulator.reset_game()
        self.observation[:] = self._small_screen()[..., None]  # as if nothing had moved before

    def _small_screen(self) -> ByteArray:
        return self._emulator.getScreenRGB()[SCREEN_ROWS[:, None], SCREEN_COLUMNS]
