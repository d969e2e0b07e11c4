import time, torch
from tests.distributed import run_distributed
from tests.parallel.runs import *

def few_steps(rank, world, steps, *ov):
    t=time.time()
    run = start(*ov)
    initial = {k:v.clone() for k,v in whole_state(run).items()}
    rec = record_gradients(run)
    losses=[];norms=[]
    for i in range(1,steps+1):
        r=run.step(i)
        losses.append(run.mean_loss(r)); norms.append(float(r.grad_norm))
    return (initial, rec, losses, norms, whole_state(run), run.config, time.time()-t) if rank==0 else None

if __name__=="__main__":
    import sys
    for m in (["quantization.bits=ternary"],["quantization.bits=4"],["quantization.bits=8"],["quantization.method=bitnet"],["quantization.method=none"],["model.sub_norm=true"],["quantization.compute=bf16"],["quantization.compute=bf16","quantization.method=none"]):
        print("==",m)
        one = run_distributed(few_steps,1,3,*m)[0]
        print("1 losses",one[2],one[3], one[6])
        for w,ov in ((2,["parallel.tensor=2"]),(2,["parallel.tensor=2","parallel.sequence=true"]),(2,["parallel.pipeline=2"]),(4,["parallel.tensor=2","parallel.pipeline=2"]),(2,[]),(2,["deepspeed.zero_optimization.stage=1"]),(3,[]),(3,["deepspeed.zero_optimization.stage=1"]),(4,["parallel.tensor=2","deepspeed.zero_optimization.stage=1"])):
            try:
                x = run_distributed(few_steps,w,3,*m,*ov)[0]
            except Exception as e:
                print(w,ov,"FAIL",str(e)[-1500:]); continue
            def diff(a,b): 
                return [n for n in b if not torch.equal(a[n],b[n])]
            fr = fraction_of_codes_that_differ(x[4],one[4],one[5]) if any(k.startswith("codes") for k in one[4]) else None
            print(w,ov, "init",diff(x[0],one[0])[:2], "loss",[abs(a/b-1) for a,b in zip(x[2],one[2])],"norm",[abs(a/b-1) for a,b in zip(x[3],one[3])],"grad",[relative_difference(a,b) for a,b in zip(x[1],one[1])],"codes",fr,"s",round(x[6],2), "state diff", len(diff(x[4],one[4])),len(one[4]))
