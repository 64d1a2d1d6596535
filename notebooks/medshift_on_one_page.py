"""MedShift (arXiv:2508.21435) on one page. An image is a row of 24 pixels across a head: skull, brain, skull.
Domain 0 shows how thick a head is, domain 1 its X-ray film, and domain 1 has larger heads. Nothing is paired.
One network learns both, then translates 0 to 1: tau near 1 keeps the head, tau near 0 fits the new domain."""
import torch
torch.manual_seed(0)
torch.set_num_threads(1)

def draw_heads(n, y):  # phantom/anatomy.py: centre and radius of n heads, (n, 2)
    return torch.stack([0.2 * torch.rand(n) - 0.1, 0.5 + 0.1 * y + 0.3 * torch.rand(n)], dim=1)

def scan(heads, y):  # phantom/xray.py: images (n, 24) of the same heads in the physics of domain y
    ray = torch.linspace(-1, 1, 24) - heads[:, :1]
    head = 2 * (heads[:, 1:]**2 - ray**2).clamp_min(0).sqrt()
    brain = 2 * (0.7 * heads[:, 1:]**2 - ray**2).clamp_min(0).sqrt()
    film = 1 - 2 * torch.exp(-3 * (head - brain) - 0.3 * brain)  # the skull absorbs ten times as much
    return (film if y == 1 else 0.7 * head - 1) + 0.03 * torch.randn(len(heads), 24)

def pair(x0, x1):  # coupling.py: each image draws its noise from the entropic optimal plan of the batch
    log_plan = -20 * torch.cdist(x1, x0).square() / 24
    for _ in range(10):  # Sinkhorn's algorithm: columns and rows come to sum to 1 (10 rounds: nearly)
        log_plan = log_plan.log_softmax(dim=0).log_softmax(dim=1)
    return x0[torch.multinomial(log_plan.exp(), num_samples=1).flatten()]

layers = [torch.nn.Linear(24 + 1 + 2, 256), torch.nn.SiLU(), torch.nn.Linear(256, 256), torch.nn.SiLU()]
net = torch.nn.Sequential(*layers, torch.nn.Linear(256, 24))
def velocity(xt, t, y):  # model.py: one network for all domains; xt (B, 24), t (B, 1), label y
    return net(torch.cat([xt, t, torch.eye(2)[y].expand(len(xt), 2)], dim=1))

optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
for step in range(800):  # train.py
    for y in (0, 1):  # pairs of noise and image are made inside each label, never across labels
        x1 = scan(draw_heads(128, y), y)
        x0 = pair(torch.randn(128, 24), x1)
        t = torch.rand(128, 1)
        xt = (1 - t) * x0 + t * x1  # flow.py: a straight line from noise (t = 0) to the image (t = 1)
        ut = x1 - x0
        vt = velocity(xt, t, y)
        (vt - ut).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()

@torch.no_grad()
def solve(x, y, start, end, steps=20):  # sampler.py: dx = v(x, t, y) dt in Euler steps, up or down in t
    for t in torch.linspace(start, end, steps + 1)[:-1]:
        x = x + (end - start) / steps * velocity(x, t.expand(len(x), 1), y)
    return x

def report(name, x, back):  # evaluate.py: how far from the truth, from the domain (energy distance), and back
    picture = "".join(" .:-=+*#%@"[int(grey)] for grey in (5 * x[0] + 5).clamp(0, 9))
    error = (x - truth).square().mean().sqrt()
    energy = 2 * torch.cdist(x, real).mean() - torch.cdist(x, x).mean() - torch.cdist(real, real).mean()
    print(f"{name:>7}  |{picture}|{error:16.3f}{energy:17.3f}{(back - x1).square().mean().sqrt():12.4f}")

heads = draw_heads(500, 0)
x1, truth, real = scan(heads, 0), scan(heads, 1), scan(draw_heads(500, 1), 1)
print(f"{'':37}from the truth  from the domain  round trip")
for tau in (1.0, 0.9, 0.8, 0.6, 0.4, 0.2, 0.0):  # translate.py: down to t = tau as domain 0, up as domain 1
    x = solve(solve(x1, 0, 1, tau), 1, tau, 1)
    report(f"tau {tau}", x, back=solve(solve(x, 1, 1, tau), 0, tau, 1))
report("truth", truth, back=x1 * torch.nan)  # the truth makes no round trip
