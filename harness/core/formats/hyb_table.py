"""The table of QTIP's HYB code: 512 pairs of values, the second of which also stands for its negative.

They are the centres of k-means (Lloyd 1982) for pairs of a normal distribution with the second value folded to its
magnitude, on a grid of 384 by 192 quantiles, in a random order. Stored as float16, pair by pair, in base64.

Paper: Tseng et al. 2024, arXiv 2406.11235 (QTIP), section 3.1.2: the table is initialised by k-means.
"""

from __future__ import annotations

import base64

import torch
from torch import Tensor

from harness.core.constants import constant

INDEX_BITS = 9
_PAIRS = (
    "Wb3tPYeudTFhNdM6iSgYPkY8ujZIN2RAB7wkONg+VD00NuA2RK83OJbAtUEjPIo0kjVXPDO+3jI3ue49Br5yOdQ9BkKPORUzzLjZ"
    "PEq9ozyRrQcoaz9TPiq68TczQFg6FDW9Pa29BkFcMMg7uLxyPqU79jWDvCw4wK4QOQbCbz3xvD895b3DOnE1Nz0wPaA2kjpHOoe3"
    "BTuTvKM8KL0HO7+sTTwuuvA0WDvQPlw5GUA/uV08t7h3Kl08szkIOig8O7wePMC7njyWPO0zBjCOPmM5K0FStCM+Oj0iPui9nT+V"
    "QJg7mq8GN6i+UD0GQWo+MrQwPUkwIDrLKAU4UD0iPA0pjDwIO0IqHSyoOZi4vjpHQGk+L8AeOt0zIzzXOA06h7rwMn49iUBEPcA5"
    "nr4uOn+rxTwOOGk67jZGMh28HjrFNAZCd7iwOAbCADR7NbE7xTh6PzO8Iz1AutwpATmoNPC33D3PvhA/jDqAP748GEBEumY69L3t"
    "N6E4BTvMqowzrDzNNZZAIDnMOp499DO3PMu6FjDEvyc4Ij3cKti+fTNZOaM7+rE7MNY4LTl7QI4uWzx+OGY0QDgmuS05JkHDPMY8"
    "7jeCsLQ/qrfhO4iynDdntco8WTRUM6o4TTi2P2U5xriyM+K8CEANOMI4pjNJMDKoWjeTwB81lTAzOZqxL0HXvIgr+TiZL2Y6nDNA"
    "u4Y6rTJMPRi0DzarNlQvprpUO8E2/D+VNmc5BrhFNBU13DkwMPM1NLdAN5OxnyksQSc4/DeGPFA7JkC2PcE/TrgyQWYthj19OAQ3"
    "arXzMuE8bTuOO98wxzUXOCg6+ymIPCArJLqAPhA4kjnxNXc1UTosOS+5KTi0NOk2BbA0Pcaxszx1sR88ADx6KgI7/Ty7wHU56a1Q"
    "LtK5szi3PeQ2sD4yP0gzPkGPOaI6OzjHPuy1ozmwPa80qbh+PmA2Sz+iuVw9SbfiL7e61TjAvVdAiKyiO8s1kCkPwdg+aTsGOyK8"
    "BT/aOSU1IDhAMP8zGDkUvps8KboGQnm3OzlONtRAkjY6OvIyvjljOO07ybx9Nqm+2iyktaJAADlWPKGkmjCfvQZC9bnjPzw6PDgf"
    "v2A787vfP2+2wjTEwUJAsyjCQOiz5jJjve85abcDP/W5BzwGQuMzTrkWNeooC0D/uy1BYT6HLK69sj5zPgc4zromP8Qw6i9hq7Q9"
    "hRHuKbGywjQ0uF085rTdNDE5MzZ7uLc52T2hPi68pjF0sUQ77rwzP1it8Tm+OnM1/D5jNj27FDwHwR89FTrANte5xECctkY9XjnF"
    "NwPAXT8tKUU/ZzeoPQs7cTzgsYc5srZZPj+8cTYoN6o0wjJWQB87jzkFvTQ4hjNTO7M6BkJtLrY08jynPFC0aDwSPRY/PLZJPN82"
    "Mj5jtRdAgL8iPrY1yzMTwLQ0CbqIOeK8Ezy+uxA59zthPfQ9iT17v/ItOjKRN6I5yz19tyE61zv9NxE/sThrtZkpkbkbO2G0Czrj"
    "P8MtSrgNMUo6NzsIpWU5F7nBNvQyAT+AQCU9aMBIPmg06ylTL1w4ujcZPeu1gzvPsPs+5LWLOlU18TjvvDE5w7ZuKYi4mDVeuHk3"
    "MLBDPoK/GD3ivxg8uKzEOtw8+jB8vMw9fz3xOuiu0DS2QJc1ZL3mNjMw5ToEvKE0wz01LN05Mz1OwC04ziv0L4o8MTzpuV4wnT9I"
    "O3/A/TubuSszmzQ9NeG7Pzs7uSU/yjhdMm60KzlOPhhBeTiCKZS6fDwusFpAzDxaOpI33jfROU0wjrhRQGu8iEAnPJNAI7MGQjY+"
    "uDoJvwI3dLfLPDE9XT0yMoo4ST9+PJC33TWMQJxBarQsMOK1PjYWu7opxi/qPBU7ljjWLo8y2rsMLPA5pzxQPYM4l7FeOtUuODfb"
    "ulRA9TpGN3G/9kCNu2421D+RP1o6ST4rOJgzNbi9P+0xfCnXuXQ2NkA2OGG8KDkhQFI80DwZOb0nODtetOI7H7u8NAqxNDN/vCY7"
    "EzyqPIK61z0uwVk3vj7DO+47DTldvKYrVjsPNNi1KTASuCEq3z+iQPgnHTNSOW0pCTOzP6o9xzy+GeU0DL81QA65hjBDsqs98LXM"
    "OCC/BjlfvsY7SD6xNY21tj1MPCZBM0CtNNE/VD0bsqk4TbklOs81uj7zOuQ7kirfOHqr8jWwu1Y+TbTyOng8jD67MGE8Zz6qPL05"
    "kEALu685ervUMTY3LzutObg5xb1OPY0zezokPmkywjguPks8BzshuxQ4FqiFOIS9vDhTMsc0qLuiPZ29azLLuMA7cr/INEk1kTAr"
    "KBI8o7S2PsM7GD6mOdg+37nUPNQ7Kzp0PXExNTxvPz88DzEdtWg/Hj2CNP87CzzKPoAzYb3iK6O8uDGIPiY+iT8mNIE5vTgbvZYx"
    "9LaeMq06rzB3tF44LsE0O64+M0DmPX44IjbDPPUxzjJbvhs+b7dlOMu9YjX+Pkg6gMBJQHA+YTkGwiY6KkHMMJq9AzyhQBJARjRP"
    "PqEx5T3uvno8MB4qPQnBOTBLsfw1wSVcOs89rTkbNxQ8BkJePRu0lilFwCMuJEGxOtMoOjaQvyI6iDwQPbM/QjfnLUspEj82Lb04"
    "dz0GQhQ6sbptNimlqz7wtQI4drkdKo08wz37vW4sbrhZPfo9CTwgvc80XDhiNey6ID2+QTBAQcAcPbu0PTdlN0EphryvNOkyNTZ5"
    "NzM2a74MNrM2nziDvog4tLwnOuI44Dw="
)


@constant
def pairs(device: torch.device) -> Tensor:
    """The pairs, (512, 2) float32."""
    stored = torch.frombuffer(bytearray(base64.b64decode(_PAIRS)), dtype=torch.float16)
    return stored.view(-1, 2).float().to(device)
